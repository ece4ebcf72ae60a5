"""What the commands of ``i2am`` do, from options to results; ``config.commands`` names the function of each."""
