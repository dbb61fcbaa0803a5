"""What is known of a prompt while its answer is decoded, and the engines that turn it into choices: channels, or thresholds."""
