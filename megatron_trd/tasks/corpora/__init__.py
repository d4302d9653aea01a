"""From published corpora to files of problems: the records of each, checks on golds, duplicates and overlap."""
