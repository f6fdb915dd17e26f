"""Published weights, from their .pth files to a checkpoint of ours."""
