"""One run of a pipeline file: texts, calibration, measurements, results."""
