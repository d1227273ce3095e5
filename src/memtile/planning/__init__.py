"""How many tiles, living where: from counts and rates alone, without a tensor."""
