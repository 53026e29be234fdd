"""Item tables on TorchRec: what a table is, how it is sharded over ranks, how it is updated."""
