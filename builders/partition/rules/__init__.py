"""How placements pass through each operator: one small pure function each, and the table of them."""
