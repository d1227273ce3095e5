"""Doors to the engines that keep tiles as shards over ranks; each is imported where it is used."""
