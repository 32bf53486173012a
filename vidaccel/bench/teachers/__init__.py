"""`vidaccel bench teachers`: what a teacher with a long memory teaches, against one with a short memory."""
