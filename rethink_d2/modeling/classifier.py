"""Image classifiers over any registered backbone."""
