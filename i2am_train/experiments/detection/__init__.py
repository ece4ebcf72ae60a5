"""Object detection by attention on COCO (paper 5.1): data, detectors, evaluation, report."""
