"""Every family of decoders that is claimed to be served, tiny and random, against transformers' eager attention."""
