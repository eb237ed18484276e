// Files of the user: what they are, how they are shown, and how they are sent.

const PARTS = { image: "image_url", video: "video_url", audio: "audio_url" };
const NAMES = { image: "pictures", video: "videos", audio: "sound" };

export const accepts = (modalities) => modalities.map((kind) => `${kind}/*`).join(",");

export function named(modalities) {
  const names = modalities.map((kind) => NAMES[kind] ?? kind);
  return names.length < 2 ? names.join("") : `${names.slice(0, -1).join(", ")} and ${names.at(-1)}`;
}

export const modalityOf = (file) => {
  const kind = file.type.split("/")[0];
  return kind in PARTS ? kind : null;
};

const read = (file) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} could not be read.`));
    reader.readAsDataURL(file);
  });

/** One attached file. url: for showing it here; part: as the server takes it. */
export class Attachment {
  constructor(file) {
    this.name = file.name || `pasted ${modalityOf(file)}`;
    this.modality = modalityOf(file);
    this.size = file.size;
    this.url = URL.createObjectURL(file);
    this.file = file;
  }

  async part() {
    const kind = PARTS[this.modality];
    return { type: kind, [kind]: { url: await read(this.file) } };
  }

  /** An element that shows it. */
  preview() {
    const tag = { image: "img", video: "video", audio: "audio" }[this.modality];
    const shown = document.createElement(tag);
    shown.src = this.url;
    shown.addEventListener("error", () => {
      const none = document.createElement("span");
      none.className = "no-preview";
      none.textContent = "no preview";
      shown.replaceWith(none);
    });
    if (tag === "img") shown.alt = this.name;
    else {
      shown.controls = true;
      shown.preload = "metadata";
      shown.setAttribute("aria-label", this.name);
    }
    return shown;
  }

  release() {
    URL.revokeObjectURL(this.url);
  }
}

/** Why a file cannot be attached; null: it can. */
export function refusal(file, count, info) {
  const modality = modalityOf(file);
  const name = file.name || "That";
  if (!modality || !info.modalities.includes(modality)) {
    return `${name} is not something this model reads. It reads ${named(info.modalities) || "text only"}.`;
  }
  if (count >= info.limits.items) return `One question can have ${info.limits.items} items. Remove one first.`;
  if (file.size > info.limits.part_bytes) {
    return `${name} has ${Math.ceil(file.size / 2 ** 20)} MiB; the server takes ${info.limits.part_bytes / 2 ** 20} MiB.`;
  }
  return file.size ? null : `${name} is empty.`;
}
