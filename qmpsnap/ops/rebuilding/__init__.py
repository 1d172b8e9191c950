"""What a lost store is made again from: images found on disk, and the plan of what they were."""
