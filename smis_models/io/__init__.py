"""Files in and out: pictures, label maps, checkpoints, animations."""
