"""nanochat, functional: parameters are data, behaviour is pure functions, devices are placements."""
