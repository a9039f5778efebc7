"""PyTorch implementations of the methods without a teacher, put together from parts of transformers and timm, for
peer_models.py. Each takes images [B, C, Y, X], and labels where it learns from them, and returns the loss.
"""
import torch
from torch import fft, nn
from torch.nn import functional as F


def vit_mae(numbers, ratio=0.75):
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    (width, depth, heads), (inner, layers, parts) = numbers["encoder"], numbers["decoder"]
    return ViTMAEForPreTraining(ViTMAEConfig(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * width,
        image_size=numbers["side"], patch_size=numbers["patch"], decoder_hidden_size=inner, decoder_num_hidden_layers=layers,
        decoder_num_attention_heads=parts, decoder_intermediate_size=4 * inner, mask_ratio=ratio, norm_pix_loss=True))


class SupMae(nn.Module):
    def __init__(self, numbers):
        super().__init__()
        width, classes = numbers["encoder"][0], numbers["classes"]
        self.model = vit_mae(numbers)
        self.head = nn.Sequential(nn.Linear(width, 4 * width), nn.BatchNorm1d(4 * width), nn.ReLU(), nn.Linear(4 * width, classes))

    def forward(self, images, labels):
        encoded = self.model.vit(images)
        pred = self.model.decoder(encoded.last_hidden_state, encoded.ids_restore).logits
        pixel = self.model.forward_loss(images, pred, encoded.mask)
        logits = self.head(encoded.last_hidden_state[:, 1:].mean(1)) / 10
        return pixel + 0.01 * F.cross_entropy(logits, labels)


class RMae(nn.Module):
    """Two decoders on one encoder, of a mask and its complement."""

    def __init__(self, numbers):
        super().__init__()
        self.model = vit_mae(numbers)
        self.anchor = vit_mae(numbers).decoder

    def views(self, images):
        config, embeddings = self.model.vit.config, self.model.vit.embeddings
        noise = torch.rand(len(images), embeddings.num_patches, device=images.device)
        config.mask_ratio = 0.75
        first = self.model.vit(images, noise=noise)
        config.mask_ratio = 0.25
        return first, self.model.vit(images, noise=-noise)

    def forward(self, images):
        first, second = self.views(images)
        pred = self.model.decoder(first.last_hidden_state, first.ids_restore).logits
        anchor = self.anchor(second.last_hidden_state, second.ids_restore).logits
        siamese = (((pred - anchor) ** 2).mean(-1) * first.mask).sum() / first.mask.sum()
        return siamese + self.model.forward_loss(images, anchor, first.mask)


class ContrastiveMae(RMae):
    def __init__(self, numbers):
        super().__init__(numbers)
        del self.anchor
        self.model.decoder.decoder_pred = nn.Identity()
        widths = [numbers["decoder"][0], numbers["hidden"], numbers["hidden"], numbers["embed_dim"]]
        layers = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Linear(a, b), nn.GELU())]
        self.head = nn.Sequential(*layers[:-1])

    def embed(self, view):
        tokens = self.model.decoder(view.last_hidden_state, view.ids_restore).logits
        return F.normalize(self.head(tokens.mean(1)), dim=-1)

    def forward(self, images):
        first, second = (self.embed(view) for view in self.views(images))
        logits, target = first @ second.T / 0.2, torch.arange(len(images), device=images.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class MaskFeat(nn.Module):
    """timm's vision transformer with mask tokens in place, and histograms of gradients by convolution and scatter."""

    def __init__(self, numbers):
        super().__init__()
        from timm.models.vision_transformer import VisionTransformer

        width, depth, heads = numbers["encoder"]
        self.patch, self.ratio = numbers["patch"], numbers["ratio"]
        self.model = VisionTransformer(
            img_size=numbers["side"], patch_size=self.patch, num_classes=0, embed_dim=width, depth=depth, num_heads=heads,
            global_pool="")
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.head = nn.Linear(width, 3 * 9 * (self.patch // 8) ** 2)
        sobel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.register_buffer("kernels", torch.stack([sobel, sobel.T]).unsqueeze(1).repeat(3, 1, 1, 1))

    @torch.no_grad()
    def target(self, images):
        batch, channels, height, width = images.shape
        gradient = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), self.kernels, groups=channels)
        gradient = gradient.reshape(batch, channels, 2, height, width)
        bins = torch.floor(torch.atan2(gradient[:, :, 0], gradient[:, :, 1]) / torch.pi * 9).long() % 9
        planes = torch.zeros(batch, channels, 9, height, width, device=images.device)
        planes.scatter_(2, bins.unsqueeze(2), gradient.norm(dim=2, keepdim=True))
        cells = planes.reshape(batch, channels, 9, height // 8, 8, width // 8, 8).sum((4, 6))
        cells, side = F.normalize(cells, dim=2), self.patch // 8
        tokens = cells.reshape(batch, channels, 9, height // self.patch, side, width // self.patch, side)
        return tokens.permute(0, 3, 5, 1, 2, 4, 6).reshape(batch, -1, channels * 9 * side * side)

    def forward(self, images):
        x = self.model.patch_embed(images)
        rank = torch.rand(*x.shape[:2], device=x.device).argsort(1).argsort(1)
        hidden = rank < round(self.ratio * x.shape[1])
        x = torch.where(hidden.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        x = self.model.norm(self.model.blocks(self.model._pos_embed(x)))[:, 1:]
        pred, target = self.head(x[hidden]), self.target(images)[hidden]
        return ((pred - target) ** 2).mean()


class Mfm(nn.Module):
    """timm's BEiT on filtered images, and the distance of spectra at hidden frequencies."""

    def __init__(self, numbers):
        super().__init__()
        from timm.models.beit import Beit

        width, depth, heads = numbers["encoder"]
        side, self.patch = numbers["side"], numbers["patch"]
        self.model = Beit(
            img_size=side, patch_size=self.patch, num_classes=0, global_pool="", embed_dim=width, depth=depth, num_heads=heads,
            use_abs_pos_emb=True, use_rel_pos_bias=False, init_values=None)
        self.head = nn.Linear(width, 3 * self.patch**2)
        place = torch.arange(side) - side // 2
        self.register_buffer("disc", (place[:, None] ** 2 + place**2 < numbers["radius"] ** 2).float())

    def forward(self, images):
        low = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
        band, axes = torch.where(low, self.disc, 1 - self.disc), (-2, -1)
        seen = fft.ifft2(fft.ifftshift(fft.fftshift(fft.fft2(images), dim=axes) * band, dim=axes)).real
        x = self.head(self.model.forward_features(seen)[:, 1:])
        n = images.shape[-1] // self.patch
        pred = x.reshape(-1, n, n, self.patch, self.patch, 3).permute(0, 5, 1, 3, 2, 4).reshape(images.shape)
        difference = fft.fftshift(fft.fft2(pred, norm="ortho") - fft.fft2(images, norm="ortho"), dim=axes)
        distance = torch.sqrt(difference.real**2 + difference.imag**2 + 1e-12) * (1 - band)
        return distance.sum() / (3 * (1 - band).sum())


class Igpt(nn.Module):
    """transformers' ImageGPT; its biases, which the paper does not have, are not trained."""

    def __init__(self, numbers):
        super().__init__()
        from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

        width, depth, heads = numbers["encoder"]
        self.colors, tokens = numbers["colors"], numbers["side"] ** 2
        self.model = ImageGPTForCausalImageModeling(ImageGPTConfig(
            vocab_size=self.colors + 1, n_positions=tokens + 1, n_embd=width, n_layer=depth, n_head=heads, resid_pdrop=0,
            embd_pdrop=0, attn_pdrop=0))
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not name.endswith("bias"))
        self.register_buffer("palette", torch.rand(self.colors, 3) * 2 - 1)

    def forward(self, images):
        pixels = images.clamp(-1, 1).flatten(2).transpose(1, 2)
        colors = torch.cdist(pixels, self.palette.expand(len(images), -1, -1)).argmin(-1)
        sequence = torch.cat([torch.full_like(colors[:, :1], self.colors), colors], 1)
        return self.model(sequence, labels=sequence).loss


MODELS = {"supmae": SupMae, "rmae": RMae, "contrastive_mae": ContrastiveMae, "maskfeat": MaskFeat, "mfm": Mfm, "igpt": Igpt}
