// The text of PDF files, by pdf.js, which is loaded with the first one and reads in a worker. Nothing of a file is drawn or run.

const LONGEST_MS = 60_000; // of reading; a file may be made to take for ever
const MOST_PAGES = 2000;

let library = null;

async function load() {
  const loaded = await import("/static/pdfjs/pdf.min.mjs");
  loaded.GlobalWorkerOptions.workerSrc = "/static/pdfjs/pdf.worker.min.mjs";
  return loaded;
}

// The text of all pages, at most `limit` characters and a few more. An Error says in words why there is none.
export async function readText(buffer, limit) {
  library ??= load().catch((error) => { library = null; throw error; });
  const { getDocument, VerbosityLevel } = await library;
  const task = getDocument({
    data: new Uint8Array(buffer), isEvalSupported: false, useWasm: false, useWorkerFetch: false, useSystemFonts: false, disableFontFace: true,
    enableXfa: false, verbosity: VerbosityLevel.ERRORS,
  });
  let timer = 0;
  const late = new Promise((_, reject) => { timer = setTimeout(() => reject(new Error("takes too long to read")), LONGEST_MS); });
  try {
    return await Promise.race([pagesOf(await Promise.race([task.promise, late]), limit), late]);
  } catch (error) {
    if (error.name === "PasswordException") throw new Error("is locked with a password");
    if (error.name === "InvalidPDFException") throw new Error("is not a PDF that can be read");
    throw error;
  } finally {
    clearTimeout(timer);
    task.destroy();
  }
}

async function pagesOf(pdf, limit) {
  if (pdf.numPages > MOST_PAGES) throw new Error(`has more than ${MOST_PAGES} pages`);
  const pages = [];
  let length = 0;
  for (let number = 1; number <= pdf.numPages && length <= limit; number++) {
    const page = await pdf.getPage(number);
    const { items } = await page.getTextContent();
    const text = items.map((item) => (item.str ?? "") + (item.hasEOL ? "\n" : "")).join("").replace(/\0/g, "").trim();
    page.cleanup();
    if (text) pages.push(text);
    length += text.length;
  }
  if (!pages.length) throw new Error("has no text, only pictures of pages");
  return pages.join("\n\n");
}
