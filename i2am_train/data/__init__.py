"""Try-on data: the sample contract, the VITON-HD reader, the embedded synthetic set, augmentation and checks.

OpenCV runs on one thread from here on: pictures are read by several worker processes at once, and a worker that is
forked from a process with OpenCV threads waits for them forever.
"""

import cv2

cv2.setNumThreads(1)
