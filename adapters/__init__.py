"""What is true of some versions only: one file, one capability, one library, one range. Found by `rlpatch.registry`."""
