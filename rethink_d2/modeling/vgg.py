"""VGG-16 without FPN."""
