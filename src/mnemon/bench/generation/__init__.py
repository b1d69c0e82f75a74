"""The benchmark of generation: what the next thousand tokens cost after a prefix of any length, for every memory."""
