"""What a dataset lacks, derived from photographs, parsing maps and poses: masks and agnostic pictures."""
