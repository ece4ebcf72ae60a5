"""The object detection experiment (paper 5.1): COCO's objects, detectors, boxes from attention, tables, page."""
