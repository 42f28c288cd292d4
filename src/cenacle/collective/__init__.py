"""Ways for ranks to talk: one small interface, see `base.Collective`."""
