"""How good and how varied pictures are: LPIPS, mCSD and mOCD, FID, mIoU."""
