//! Tests of files of torch.save: every layout is read, and any other pickle is rejected without being executed.

use crate::support::method_ext::MethodExt;
use crate::support::{Outcome, oracle, path_text, write};
use libtest_mimic::Failed;
use occlude::checkpoint;
use occlude::error::{Error, ExitCode};
use occlude::interop;
use occlude::interop::{ImportOptions, WeightFormat, to_official};
use occlude::{config::Config, optim::flat::FlatParams, part::encoder::position};
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

crate::trials![
    files_of_torch_save_are_read_in_every_layout,
    a_file_without_a_state_dict_is_rejected_with_a_remedy,
    a_hostile_pickle_is_rejected_and_executes_nothing,
    a_pickle_with_huge_claimed_sizes_allocates_little,
    tensors_stay_inside_their_storages,
    an_invalid_archive_is_rejected,
    damaged_files_never_panic,
];

fn import(file: &Path, out: &Path) -> Result<Vec<String>, Error> {
    let overrides = ["encoder.heads=2", "decoder.heads=2"].map(|pair| format!("method.mae.{pair}")).to_vec();
    let order = ImportOptions {
        format: WeightFormat::Mae,
        from: file.to_owned(),
        out: path_text(out),
        config: None,
        overrides,
    };
    interop::import(&order)
}

/// Returns a small model under the official names, as safetensors and in every format of PyTorch.
fn saved_model() -> Result<TempDir, Failed> {
    let folder = tempfile::tempdir()?;
    let config = Config::parse(&crate::support::training_job::tiny_config().to_string(), &[])?;
    let method = config.method.build(&config.input)?;
    let flat = FlatParams::new(method.params(), 1, Kind::Float, Device::Cpu)?;
    let mut tensors: Vec<(String, Tensor)> = (0..flat.specs.len())
        .map(|i| to_official("mae", &flat.specs[i].name, &flat.param_view(&flat.master, i), &method.grid()))
        .collect();
    let table = position::sincos_2d(&method.grid(), 16);
    let table = Tensor::cat(&[Tensor::zeros([1, 16], (Kind::Float, Device::Cpu)), table], 0).unsqueeze(0);
    tensors.extend(["pos_embed", "decoder_pos_embed"].map(|name| (name.to_owned(), table.shallow_clone())));
    write(&folder.path().join("plain"), &tensors)?;
    oracle("torch_save.py", &[&path_text(folder.path().join("plain")), &path_text(folder.path())])?;
    Ok(folder)
}

fn files_of_torch_save_are_read_in_every_layout() -> Outcome {
    let folder = saved_model()?;
    let at = |name: &str| folder.path().join(name);
    import(&at("plain"), &at("plain-run"))?;
    let plain = checkpoint::load_from_url(&path_text(at("plain-run")))?.tensors;
    for name in ["model", "state_dict", "views", "protocol4", "path"] {
        import(&at(&format!("{name}.pth")), &at(name)).map_err(|error| error.with_context(name))?;
        assert!(checkpoint::load_from_url(&path_text(at(name)))?.tensors == plain, "{name} holds other values");
    }
    import(&at("bfloat16.pth"), &at("bfloat16"))?;
    for (name, tensor) in checkpoint::load_from_url(&path_text(at("bfloat16")))?.tensors {
        let floats = |bytes: &[u8]| -> Vec<f32> {
            bytes.chunks(4).map(|four| f32::from_le_bytes(four.try_into().expect("four"))).collect()
        };
        for (narrow, wide) in floats(&tensor.bytes).iter().zip(floats(&plain[&name].bytes)) {
            assert!((narrow - wide).abs() <= wide.abs() / 256.0, "{name}: {narrow} for {wide}");
        }
    }
    Ok(())
}

#[track_caller]
fn assert_rejected(file: &Path, expected: &str) {
    let out = file.with_extension("out");
    let error = import(file, &out).expect_err("refused");
    assert_eq!(error.code, ExitCode::Usage, "{error}");
    assert!(error.message.contains(expected), "no {expected:?} in: {error}");
    assert!(!out.exists());
}

fn a_file_without_a_state_dict_is_rejected_with_a_remedy() -> Outcome {
    let folder = saved_model()?;
    assert_rejected(&folder.path().join("legacy.pth"), "before PyTorch 1.6");
    assert_rejected(&folder.path().join("legacy.pth"), "save_file(");
    assert_rejected(&folder.path().join("numpy.pth"), "numpy");
    assert_rejected(&folder.path().join("numpy.pth"), "weights_only=False");
    assert_rejected(&folder.path().join("double.pth"), "is Double");
    Ok(())
}

/// Writes an archive like that of PyTorch, with this pickle and one storage of four floats.
fn archive(path: &Path, pickle: &[u8]) -> Outcome {
    archive_of(path, pickle, 4)
}

fn archive_of(path: &Path, pickle: &[u8], floats: usize) -> Outcome {
    let storage = vec![0; 4 * floats];
    let mut zip = ZipWriter::new(std::fs::File::create(path)?);
    let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    for (name, bytes) in [("data.pkl", pickle), ("byteorder", b"little"), ("data/0", &storage), ("version", b"3\n")] {
        zip.start_file(format!("archive/{name}"), stored)?;
        zip.write_all(bytes)?;
    }
    zip.finish()?;
    Ok(())
}

/// Returns the pickle of {"a": tensor} of the storage, with this count, offset, size and stride; every number below
/// 256.
fn tensor(count: u8, offset: u8, size: &[u8], stride: &[u8]) -> Vec<u8> {
    let mut out = b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage".to_vec();
    out.extend(b"ctorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK");
    out.extend([count, b't', b'Q', b'K', offset]);
    for list in [size, stride] {
        out.push(b'(');
        list.iter().for_each(|&n| out.extend([b'K', n]));
        out.push(b't');
    }
    out.extend(b"\x89ccollections\nOrderedDict\n)RtRs.");
    out
}

fn a_hostile_pickle_is_rejected_and_executes_nothing() -> Outcome {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("hostile.pth");
    let mark = folder.path().join("executed");
    let command = format!("touch {}", mark.display());
    let words = |text: &str| [b"X".as_slice(), &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat();
    let call = |module: &str, name: &str| {
        let global = format!("c{module}\n{name}\n");
        [b"\x80\x02".as_slice(), global.as_bytes(), &words(&command), b"\x85R."].concat()
    };
    let known =
        [("os", "system"), ("posix", "system"), ("builtins", "eval"), ("torch", "load"), ("collections", "Counter")];
    for (module, name) in known.into_iter().chain([("subprocess", "Popen"), ("torch._utils", "_rebuild_tensor_v2x")]) {
        archive(&file, &call(module, name))?;
        assert_rejected(&file, &format!("{module}.{name}"));
        assert_rejected(&file, "save_file(");
    }
    // The same by names on the stack, by an instance, and by attributes of allowed objects.
    let stacked =
        [b"\x80\x04".as_slice(), &words("os"), &words("system"), b"\x93", &words(&command), b"\x85R."].concat();
    archive(&file, &stacked)?;
    assert_rejected(&file, "os.system");
    archive(&file, format!("\u{28}S'{command}'\nios\nsystem\n.").as_bytes())?;
    assert_rejected(&file, "opcode");
    archive(&file, b"\x80\x02ccollections\nOrderedDict.__class__\n)R.")?;
    assert_rejected(&file, "OrderedDict.__class__");
    archive(&file, b"\x80\x02ctorch\nFloatStorage\n)R.")?;
    assert_rejected(&file, "cannot be called");
    archive(&file, b"\x80\x02cargparse\nNamespace\n)\x81}b.")?;
    assert_rejected(&file, "no state dict");
    assert!(!mark.exists(), "something was executed");
    Ok(())
}

/// Lengths, depth, sharing: whatever sizes a few bytes claim, the error comes at once.
fn a_pickle_with_huge_claimed_sizes_allocates_little() -> Outcome {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("bomb.pth");
    // Each list contains the previous one twice: 2^40 leaves for a recursive walk.
    let mut doubling = b"\x80\x02]q\x00".to_vec();
    (0..40u8).for_each(|i| doubling.extend([b']', b'(', b'h', i, b'h', i, b'e', b'q', i + 1]));
    doubling.push(b'.');
    let endless = [b"\x80\x02".as_slice(), &b"]".repeat(3 << 20), b"."].concat();
    let remembering: Vec<u8> = (0..2u32 << 20).flat_map(|i| [&b"r"[..], &i.to_le_bytes()].concat()).collect();
    let cases: [(&[u8], &str); 10] = [
        (b"\x80\x02X\xff\xff\xff\xffshort", "ends too early"),
        (b"\x80\x02\x8a\xff", "ends too early"),
        (b"\x80\x02\x8a\x09123456789.", "integer of 9 bytes"),
        (&[b"\x80\x02".as_slice(), &b"(".repeat(100_000), b"."].concat(), "nested deeper"),
        (&[b"\x80\x02]".as_slice(), &b"\x85".repeat(100_000), b"."].concat(), "no state dict"),
        (&doubling, "no state dict"),
        (&endless, "more than"),
        (&[b"\x80\x02]".as_slice(), &remembering, b"."].concat(), "more than 1048576 memo entries"),
        (b"\x80\x02h\x05.", "memo entry that does not exist"),
        (b"\x80\x02(0.", "takes more values from the stack"),
    ];
    for (pickle, expected) in cases {
        let start = Instant::now();
        archive(&file, pickle)?;
        assert_rejected(&file, expected);
        assert!(start.elapsed() < Duration::from_secs(5), "{expected}: {:?}", start.elapsed());
    }
    archive(&file, &[b"\x80\x02".as_slice(), &b"N0".repeat(9 << 20), b"."].concat())?;
    assert_rejected(&file, "more than 16777216");
    Ok(())
}

fn tensors_stay_inside_their_storages() -> Outcome {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("reach.pth");
    // The file is valid, and only the names are wrong.
    archive(&file, &tensor(4, 1, &[3], &[1]))?;
    assert_rejected(&file, "names are not");
    for (pickle, expected) in [
        (tensor(4, 0, &[5], &[1]), "beyond its storage"),
        (tensor(4, 2, &[3], &[1]), "beyond its storage"),
        (tensor(4, 0, &[2, 2], &[3, 1]), "beyond its storage"),
        // One element as a large tensor.
        (tensor(4, 0, &[200, 200, 200, 200], &[0, 0, 0, 0]), "beyond its storage"),
        (tensor(4, 0, &[2], &[1, 1]), "impossible shape"),
        (tensor(4, 0, &[1; 9], &[1; 9]), "impossible shape"),
        // More than the member holds.
        (tensor(5, 0, &[5], &[1]), "fewer elements than the pickle claims"),
    ] {
        archive(&file, &pickle)?;
        assert_rejected(&file, expected);
    }
    // Many names for the same bytes.
    let one = tensor(255, 0, &[255], &[1]);
    let entry = &one[9..one.len() - 2]; // After the name "a".
    let mut many = b"\x80\x02}(".to_vec();
    for number in 0..1000 {
        many.extend([b"X\x04\x00\x00\x00", format!("{number:04}").as_bytes(), entry].concat());
    }
    many.extend(b"u.");
    archive_of(&file, &many, 255)?;
    assert_rejected(&file, "its tensors take 1020000 bytes");
    Ok(())
}

fn an_invalid_archive_is_rejected() -> Outcome {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("odd.pth");
    let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    let options = |members: &[(&str, &[u8])]| -> Outcome {
        let mut zip = ZipWriter::new(std::fs::File::create(&file)?);
        for (name, bytes) in members {
            zip.start_file(*name, stored)?;
            zip.write_all(bytes)?;
        }
        zip.finish()?;
        Ok(())
    };
    let pickle = tensor(4, 0, &[4], &[1]);
    options(&[("a/other", b"")])?;
    assert_rejected(&file, "0 members data.pkl");
    options(&[("a/data.pkl", &pickle), ("b/data.pkl", &pickle)])?;
    assert_rejected(&file, "2 members data.pkl");
    options(&[("a/data.pkl", &pickle), ("a/byteorder", b"big")])?;
    assert_rejected(&file, "big-endian");
    options(&[("a/data.pkl", &pickle)])?;
    assert_rejected(&file, "data/0 cannot be read");
    std::fs::write(&file, b"PK\x03\x04 and no more")?;
    assert_rejected(&file, "not a complete archive");
    Ok(())
}

/// Every truncation and some thousand flips of a valid pickle: always a result, never a panic.
fn damaged_files_never_panic() -> Outcome {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("damaged.pth");
    let out = folder.path().join("out");
    let full = tensor(4, 0, &[2, 2], &[2, 1]);
    for length in 0..full.len() {
        archive(&file, &full[..length])?;
        assert!(import(&file, &out).is_err(), "{length}");
    }
    for at in 0..full.len() {
        for mask in [0x01, 0x04, 0x20, 0x80, 0xff] {
            let mut damaged = full.clone();
            damaged[at] ^= mask;
            archive(&file, &damaged)?;
            assert!(import(&file, &out).is_err(), "{at} {mask}");
        }
    }
    let mut bytes = std::fs::read(&file)?;
    for at in 0..bytes.len() {
        bytes[at] ^= 0xff;
        std::fs::write(&file, &bytes)?;
        assert!(import(&file, &out).is_err(), "{at}");
        bytes[at] ^= 0xff;
    }
    Ok(())
}
