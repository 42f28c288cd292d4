"""Node identities and pairing."""
