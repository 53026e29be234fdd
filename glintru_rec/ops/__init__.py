"""Operators on ragged batches: one file per op, each with a naive truth beside its torch path."""
