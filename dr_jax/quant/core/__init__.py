"""What every method is made of: the interface, grids, packing, exact sums."""
