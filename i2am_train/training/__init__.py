"""Training: losses of a step, random numbers, optimizer, and the LightningModule that wires them."""
