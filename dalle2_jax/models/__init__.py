"""Networks: arrays to arrays. They know no noise schedule, no data set and no training."""
