"""Images and controls to train on: data sets and their download, annotators, and augmentation."""
