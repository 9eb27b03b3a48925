"""What a run is: its settings, the files that give them, the shipped recipes, and what is wrong with those that cannot work."""
