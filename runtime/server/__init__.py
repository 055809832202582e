"""One Triton server: started, proven, watched, repaired, stopped without a trace."""
