//! PyTorch's own files: what it saves is read, and whatever else a file of that kind can ask for is refused unexecuted.

use crate::refuse::text;
use crate::support::{Outcome, oracle, write};
use libtest_mimic::Failed;
use occlude::fault::{Code, Fault};
use occlude::run::checkpoint;
use occlude::run::exchange::{self, Format, Order, official};
use occlude::{config::Config, optim::flat::Flat, part::encoder::position};
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

crate::trials![
    what_pytorch_saves_is_read_whatever_its_layout,
    what_is_no_state_dict_is_refused_with_the_remedy,
    a_hostile_pickle_is_refused_and_executes_nothing,
    a_pickle_that_claims_the_moon_costs_nothing,
    tensors_stay_inside_their_storages,
    an_odd_archive_is_refused,
    no_damage_makes_the_reader_fall,
];

fn import(file: &Path, out: &Path) -> Result<Vec<String>, Fault> {
    let set = ["encoder.heads=2", "decoder.heads=2"].map(|pair| format!("method.mae.{pair}")).to_vec();
    let order = Order { format: Format::Mae, from: file.to_owned(), out: text(out), config: None, set };
    exchange::import(&order)
}

/// A small model under the official names, as safetensors and in every way of PyTorch.
fn saved() -> Result<TempDir, Failed> {
    let place = tempfile::tempdir()?;
    let config = Config::parse(&crate::job::tiny().to_string(), &[])?;
    let method = config.method.build(&config.input)?;
    let flat = Flat::new(method.table(), 1, Kind::Float, Device::Cpu)?;
    let mut tensors: Vec<(String, Tensor)> = (0..flat.specs.len())
        .map(|i| official(method.name(), &flat.specs[i].name, &flat.part(&flat.master, i), method.grid()))
        .collect();
    let table = position::sine_cosine(method.grid(), 16);
    let table = Tensor::cat(&[Tensor::zeros([1, 16], (Kind::Float, Device::Cpu)), table], 0).unsqueeze(0);
    tensors.extend(["pos_embed", "decoder_pos_embed"].map(|name| (name.to_owned(), table.shallow_clone())));
    write(&place.path().join("plain"), &tensors)?;
    oracle("exchange_pth.py", &[&text(place.path().join("plain")), &text(place.path())])?;
    Ok(place)
}

fn what_pytorch_saves_is_read_whatever_its_layout() -> Outcome {
    let place = saved()?;
    let at = |name: &str| place.path().join(name);
    import(&at("plain"), &at("plain-run"))?;
    let plain = checkpoint::open(&text(at("plain-run")))?.tensors;
    for name in ["model", "state_dict", "views", "protocol4", "path"] {
        import(&at(&format!("{name}.pth")), &at(name)).map_err(|fault| fault.at(name))?;
        assert!(checkpoint::open(&text(at(name)))?.tensors == plain, "{name} holds other values");
    }
    import(&at("bfloat16.pth"), &at("bfloat16"))?;
    for (name, tensor) in checkpoint::open(&text(at("bfloat16")))?.tensors {
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
fn refused(file: &Path, wanted: &str) {
    let out = file.with_extension("out");
    let fault = import(file, &out).expect_err("refused");
    assert_eq!(fault.code, Code::Usage, "{fault}");
    assert!(fault.message.contains(wanted), "no {wanted:?} in: {fault}");
    assert!(!out.exists());
}

fn what_is_no_state_dict_is_refused_with_the_remedy() -> Outcome {
    let place = saved()?;
    refused(&place.path().join("legacy.pth"), "before PyTorch 1.6");
    refused(&place.path().join("legacy.pth"), "save_file(");
    refused(&place.path().join("numpy.pth"), "numpy");
    refused(&place.path().join("numpy.pth"), "weights_only=False");
    refused(&place.path().join("double.pth"), "is Double");
    Ok(())
}

/// An archive as PyTorch makes it, with this pickle and one storage of four floats.
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

/// {"a": tensor} of the storage, with this count, offset, size and stride; every number below 256.
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

fn a_hostile_pickle_is_refused_and_executes_nothing() -> Outcome {
    let place = tempfile::tempdir()?;
    let (file, mark) = (place.path().join("hostile.pth"), place.path().join("executed"));
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
        refused(&file, &format!("{module}.{name}"));
        refused(&file, "save_file(");
    }
    // The same by names on the stack, by an instance, and by attributes of what is allowed.
    let stacked =
        [b"\x80\x04".as_slice(), &words("os"), &words("system"), b"\x93", &words(&command), b"\x85R."].concat();
    archive(&file, &stacked)?;
    refused(&file, "os.system");
    archive(&file, format!("\u{28}S'{command}'\nios\nsystem\n.").as_bytes())?;
    refused(&file, "opcode");
    archive(&file, b"\x80\x02ccollections\nOrderedDict.__class__\n)R.")?;
    refused(&file, "OrderedDict.__class__");
    archive(&file, b"\x80\x02ctorch\nFloatStorage\n)R.")?;
    refused(&file, "cannot be called");
    archive(&file, b"\x80\x02cargparse\nNamespace\n)\x81}b.")?;
    refused(&file, "no state dict");
    assert!(!mark.exists(), "something was executed");
    Ok(())
}

/// Lengths, depth, sharing: whatever a few bytes claim, the answer comes at once.
fn a_pickle_that_claims_the_moon_costs_nothing() -> Outcome {
    let place = tempfile::tempdir()?;
    let file = place.path().join("bomb.pth");
    // Each list holds the one before twice: 2^40 leaves for whoever walks them.
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
        (&[b"\x80\x02]".as_slice(), &remembering, b"."].concat(), "remembers more"),
        (b"\x80\x02h\x05.", "has not made"),
        (b"\x80\x02(0.", "takes more from its stack"),
    ];
    for (pickle, wanted) in cases {
        let begun = Instant::now();
        archive(&file, pickle)?;
        refused(&file, wanted);
        assert!(begun.elapsed() < Duration::from_secs(5), "{wanted}: {:?}", begun.elapsed());
    }
    archive(&file, &[b"\x80\x02".as_slice(), &b"N0".repeat(9 << 20), b"."].concat())?;
    refused(&file, "more than 16777216");
    Ok(())
}

fn tensors_stay_inside_their_storages() -> Outcome {
    let place = tempfile::tempdir()?;
    let file = place.path().join("reach.pth");
    // What is whole comes through, and only the names are wrong.
    archive(&file, &tensor(4, 1, &[3], &[1]))?;
    refused(&file, "names are not");
    for (pickle, wanted) in [
        (tensor(4, 0, &[5], &[1]), "beyond its storage"),
        (tensor(4, 2, &[3], &[1]), "beyond its storage"),
        (tensor(4, 0, &[2, 2], &[3, 1]), "beyond its storage"),
        // One element as a large tensor.
        (tensor(4, 0, &[200, 200, 200, 200], &[0, 0, 0, 0]), "beyond its storage"),
        (tensor(4, 0, &[2], &[1, 1]), "impossible shape"),
        (tensor(4, 0, &[1; 9], &[1; 9]), "impossible shape"),
        // More than the member holds.
        (tensor(5, 0, &[5], &[1]), "shorter than it says"),
    ] {
        archive(&file, &pickle)?;
        refused(&file, wanted);
    }
    // Many names for the same bytes.
    let one = tensor(255, 0, &[255], &[1]);
    let entry = &one[9..one.len() - 2]; // Behind the name "a".
    let mut many = b"\x80\x02}(".to_vec();
    for number in 0..1000 {
        many.extend([b"X\x04\x00\x00\x00", format!("{number:04}").as_bytes(), entry].concat());
    }
    many.extend(b"u.");
    archive_of(&file, &many, 255)?;
    refused(&file, "its tensors take 1020000 bytes");
    Ok(())
}

fn an_odd_archive_is_refused() -> Outcome {
    let place = tempfile::tempdir()?;
    let file = place.path().join("odd.pth");
    let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    let make = |members: &[(&str, &[u8])]| -> Outcome {
        let mut zip = ZipWriter::new(std::fs::File::create(&file)?);
        for (name, bytes) in members {
            zip.start_file(*name, stored)?;
            zip.write_all(bytes)?;
        }
        zip.finish()?;
        Ok(())
    };
    let pickle = tensor(4, 0, &[4], &[1]);
    make(&[("a/other", b"")])?;
    refused(&file, "0 members data.pkl");
    make(&[("a/data.pkl", &pickle), ("b/data.pkl", &pickle)])?;
    refused(&file, "2 members data.pkl");
    make(&[("a/data.pkl", &pickle), ("a/byteorder", b"big")])?;
    refused(&file, "high byte first");
    make(&[("a/data.pkl", &pickle)])?;
    refused(&file, "data/0 cannot be read");
    std::fs::write(&file, b"PK\x03\x04 and no more")?;
    refused(&file, "no whole archive");
    Ok(())
}

/// Every cut and some thousand flips of a whole pickle: an answer each time, never a panic.
fn no_damage_makes_the_reader_fall() -> Outcome {
    let place = tempfile::tempdir()?;
    let (file, out) = (place.path().join("damaged.pth"), place.path().join("out"));
    let whole = tensor(4, 0, &[2, 2], &[2, 1]);
    for length in 0..whole.len() {
        archive(&file, &whole[..length])?;
        assert!(import(&file, &out).is_err(), "{length}");
    }
    for at in 0..whole.len() {
        for mask in [0x01, 0x04, 0x20, 0x80, 0xff] {
            let mut damaged = whole.clone();
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
