"""What every other part may need and none owns."""
