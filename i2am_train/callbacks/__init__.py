"""Lightning callbacks: the observers of training."""
