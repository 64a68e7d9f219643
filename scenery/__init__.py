"""What draws and generates the scenery of the two environments: no torch."""
