"""Measure what stored features are worth: probes that classify images, on train and test parts."""
