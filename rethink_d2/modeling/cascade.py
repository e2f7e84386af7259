"""Cascade R-CNN with the mask head on the last stage."""
