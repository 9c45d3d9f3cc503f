"""Ops: one public function a file, with its checks and autograd; backends behind one table."""
