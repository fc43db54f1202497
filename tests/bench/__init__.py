"""The benchmark, `make bench`: the system against bare loops of the same work, side by side on the same two cores."""
