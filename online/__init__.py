"""Online learning: from what users say of answers to a version that is better, or to none."""
