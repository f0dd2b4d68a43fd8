// The section of the map, and the order of all sections.

let showOnMap = () => {};

/** Group images by folder, the largest folders first, without the folders that all keys share. */
function byFolder() {
  const parts = images.keys.map((key) => key.split('/').slice(0, -1));
  let shared = 0;
  while (parts.length && parts.every((part) => part.length > shared && part[shared] === parts[0][shared])) shared += 1;
  const folders = new Map();
  parts.forEach((part, image) => {
    const name = part[shared] === undefined ? '(no folder)' : part.slice(0, shared + 1).join('/');
    if (!folders.has(name)) folders.set(name, []);
    folders.get(name).push(image);
  });
  const sorted = [...folders].sort((one, other) => other[1].length - one[1].length);
  const groups = sorted.slice(0, CATEGORIES.length).map(([name, points], place) => ({ name, points, color: CATEGORIES[place] }));
  const rest = sorted.slice(CATEGORIES.length);
  if (rest.length) groups.unshift({ name: `${count(rest.length)} other folders`, points: rest.flatMap((entry) => entry[1]), color: OTHERS });
  return groups;
}

/** Group images by number of tiles, from dark to light. */
function byTiles() {
  const numbers = [...new Set(images.tiles)].sort((one, other) => one - other);
  const scale = data.map.scale;
  const steps = Math.min(numbers.length, 8);
  const groups = Array.from({ length: steps }, () => ({ points: [], numbers: [] }));
  const stepOf = new Map(numbers.map((number, place) => [number, Math.floor((place * steps) / numbers.length)]));
  numbers.forEach((number) => groups[stepOf.get(number)].numbers.push(number));
  images.tiles.forEach((number, image) => groups[stepOf.get(number)].points.push(image));
  return groups.map((group, place) => {
    const [low, high] = [group.numbers[0], group.numbers.at(-1)];
    const color = scale[steps === 1 ? 4 : Math.round(1 + (place * (scale.length - 2)) / (steps - 1))];
    return { points: group.points, color, name: low === high ? plural(low, 'tile') : `${low} to ${high} tiles` };
  });
}

const COLORINGS = { folder: byFolder, tiles: byTiles, 'one color': () => [{ name: 'image', points: images.keys.map((_, image) => image), color: CATEGORIES[0] }] };

function mapWords() {
  const { projection, explained, of: all } = data.map;
  const shown = images.keys.length;
  const which = shown < all ? `The map shows ${count(shown)} of ${count(all)} images with features, chosen at random.` : all === 1 ? 'The map shows the only image with features.' : `The map shows all ${count(shown)} images with features.`;
  const how = projection === 'umap'
    ? 'UMAP places images with similar pooled vectors near each other; distances between groups, and directions, mean little.'
    : `Images with similar pooled vectors are close to each other. The axes are the first two principal components, with ${explained.map(percent).join(' and ')} of the variance.`;
  const drawn = Object.keys(data.thumbnails.pictures).length;
  return `${which} ${how}${drawn < shown ? ` ${plural(drawn, 'image')} ${drawn === 1 ? 'has' : 'have'} a thumbnail on this page.` : ''}`;
}

/** Create the description of an image, beside the map and in its tooltip. */
function describe(image) {
  const problem = data.thumbnails.problems[image];
  const text = [make('div', {}, images.keys[image]), make('div', { class: 'faint' }, sizeOf(image))];
  if (problem) text.push(make('div', { class: 'faint' }, `no thumbnail: ${problem}`));
  return [thumbnail(image), make('div', { class: 'text' }, ...text)];
}

function tip(image, event) {
  const box = byId('tip');
  box.hidden = image < 0;
  if (image < 0) return;
  box.replaceChildren(...describe(image));
  const [width, height] = [box.offsetWidth, box.offsetHeight];
  const left = event.clientX + 16 + width > innerWidth - 8 ? event.clientX - 16 - width : event.clientX + 16;
  box.style.left = `${Math.max(8, left)}px`;
  box.style.top = `${Math.max(8, Math.min(innerHeight - height - 8, event.clientY + 12))}px`;
}

function legendOf(groups) {
  const [named, others] = [groups.filter((group) => group.color !== OTHERS), groups.filter((group) => group.color === OTHERS)];
  return [...named, ...others].map(({ name, points, color }) => {
    const dot = make('span', { class: 'dot' });
    dot.style.background = color;
    return make('li', {}, dot, `${name} (${count(points.length)})`);
  });
}

function showMap() {
  const section = byId('map');
  const detail = make('div', { class: 'detail', role: 'status', id: 'detail' });
  const { field, told, list } = searchBox((hits) => mark(hits), (image) => showOnMap(image));
  let mark = () => {};
  const find = make('div', { class: 'controls' }, make('label', { for: 'search' }, 'Search by key'), field);
  if (!images.keys.length) {
    section.append(make('p', {}, 'No image has features yet: there is nothing to lay out.'), find, told, list);
    return;
  }
  const canvas = make('canvas', { tabindex: 0, role: 'img', 'aria-label': `Map of ${count(images.keys.length)} images; arrow keys move it, plus and minus zoom, 0 shows all. The search finds images by key.` });
  const plane = new Plane(canvas, images.x, images.y);
  mark = (hits) => {
    plane.marked = hits;
    plane.draw();
  };
  const legend = make('ul', { class: 'legend' });
  const color = (name) => {
    const groups = COLORINGS[name]();
    legend.replaceChildren(...legendOf(groups));
    plane.color(groups);
  };
  const choose = (image) => {
    plane.chosen = image;
    plane.draw();
    detail.replaceChildren(...(image < 0 ? [make('p', { class: 'faint' }, 'Point at an image to see it; click to keep it here.')] : describe(image)));
  };
  showOnMap = (image) => {
    choose(image);
    plane.center(image);
    canvas.scrollIntoView({ block: 'nearest' });
  };
  steer(plane, (image, event) => {
    if (plane.hovered !== image) plane.draw();
    plane.hovered = image;
    tip(image, event);
  }, choose);
  const options = Object.keys(COLORINGS).map((name) => make('option', {}, name));
  const select = make('select', { id: 'color', onchange: () => color(select.value) }, ...options);
  if (byFolder().length < 2) select.value = 'tiles';
  const zoom = (label, sign, act) => make('button', { type: 'button', 'aria-label': label, title: label, onclick: act }, sign);
  const buttons = make('div', { class: 'zoom' }, zoom('zoom in', '+', () => plane.zoomBy(1.6)), zoom('zoom out', '\u2212', () => plane.zoomBy(1 / 1.6)), zoom('show all', 'all', () => plane.reset()));
  section.append(make('p', { class: 'faint' }, mapWords()));
  const pictures = make('input', { type: 'checkbox', id: 'pictures', checked: true, onchange: () => {
    plane.hasPictures = pictures.checked;
    plane.draw();
  } });
  const withPictures = make('label', { title: `drawn if at most ${MOST_PICTURES} images are in view, and where they do not overlap` }, pictures, ' thumbnails on the map');
  find.append(make('label', { for: 'color' }, 'Color by'), select, withPictures);
  const hint = make('p', { class: 'faint' }, `Drag to move; zoom with the buttons, with two fingers, or with the wheel after a click on the map. Thumbnails that would overlap are dots until you zoom in${images.keys.length > MOST_PICTURES ? `, and all are while more than ${MOST_PICTURES} images are in view` : ''}.`);
  const stage = make('div', {}, make('div', { class: 'stage' }, canvas, buttons), legend, hint);
  section.append(find, make('div', { class: 'plane' }, stage, make('div', { class: 'side' }, detail, told, list)));
  color(select.value);
  choose(-1);
}

showHead();
showSummary();
showMap();
showTokenMaps();
showNeighbors();
showDuplicates();
showTiles();
showSkipped();
showThroughput();
showRecipe();
document.documentElement.dataset.drawn = 'yes';
