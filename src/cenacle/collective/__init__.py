"""Communication between ranks, behind one small interface: `base.Collective`."""
