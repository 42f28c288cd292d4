"""Several nodes as one cluster: the head, agents, groups, placement and downloads."""
