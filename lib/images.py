"""Features of images: encoded by the vision tower, and kept as long as they stay the same."""
import torch

PATCHES_AT_ONCE = 2**14  # image patches that the tower works on where no gradient needs them


class ImageFeatures:
    """Encodes images and remembers features in host memory; the oldest give way to newer ones.

    Args:
        family: as in lib/families.py.
        limit: bytes that remembered images and their features may take.
    """

    def __init__(self, family, limit):
        self.family = family
        self.limit = limit
        self.clear()

    def clear(self):
        """Forget all, as after a change of the vision tower."""
        self.remembered = {}  # id(image) -> (image, so that its id stays; features; bytes)
        self.size = 0  # bytes of all of them

    def encode(self, images):
        """Features of each image, encoded now. Returns: list of tuples of tensors; patches."""
        features = self.family.encode_images(images)
        return features, sum(self.family.count_patches(f) for f in features)

    @torch.no_grad()
    def recall(self, images):
        """Features of each image, encoded only if they are not remembered.

        Returns: list of tuples of tensors in host memory; patches encoded now.
        """
        found = {}
        new = {}
        for image in images:
            if id(image) in self.remembered:
                found[id(image)] = self.remembered[id(image)][1]
            else:
                new[id(image)] = image
        patches = self._encode_new(list(new.values()), found)
        self._forget_oldest()
        return [found[id(image)] for image in images], patches

    def _encode_new(self, images, found):
        """Encode images, a few at a time, into `found` and host memory. Returns: patches."""
        total = 0
        while images:
            count = max(1, PATCHES_AT_ONCE // self.family.tower_patches(images[0]))
            encoded, patches = self.encode(images[:count])
            total += patches
            for image, features in zip(images, encoded):
                found[id(image)] = tuple(f.cpu() for f in features)
                self._remember(image, found[id(image)])
            images = images[count:]
        return total

    def _remember(self, image, features):
        pixels = 3 * image.width * image.height  # bytes
        size = pixels + sum(f.nbytes for f in features)
        self.remembered[id(image)] = (image, features, size)
        self.size += size

    def _forget_oldest(self):
        while self.size > self.limit:
            oldest = next(iter(self.remembered))
            _, _, size = self.remembered.pop(oldest)
            self.size -= size
