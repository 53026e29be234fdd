"""From an interaction log to sequences: prepare, vocabulary, dataset, reader."""
