"""What plugs into MMEngine's runner."""
