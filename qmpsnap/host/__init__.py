"""What the operating system gives: files, threads, programs, descriptors, and storage that may hang."""
