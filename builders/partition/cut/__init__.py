"""Whole graph -> rank graphs: a split is searched, then carried out on the nodes and on the weights."""
