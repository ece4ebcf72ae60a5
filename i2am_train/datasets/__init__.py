"""Try-on data: the sample contract, the VITON-HD reader, the embedded synthetic set, augmentation and checks."""
