"""Frames, video files, streams, and how close one video is to another."""
